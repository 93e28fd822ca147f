"""Measurements of softcache, of what it replaces, and of the machine; torch waits as under the command."""

from softcache.runtime.threads import share_cores

share_cores()

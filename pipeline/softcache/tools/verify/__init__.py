"""Verifies a cache: checksums and markers of every unit, and labels against a fresh teacher."""

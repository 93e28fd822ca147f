"""Faults on purpose: kills, full disks, damaged bytes, forged caches. Short versions run in the suite, long ones by
`make chaos`; each driver also prints its table: `python -m tests.chaos.crash`, `corruption`, `fuzz`."""

"""Faults: real jobs in real processes are killed, starved and damaged, and must end the same.

    python -m tests.faults --out benchmarks/results/faults.json [--quick] [--only NAME ...]

`bench.py` runs the job and judges its end, `watched.py` is the command line under observation, and
each other module is a family of scenarios.
"""

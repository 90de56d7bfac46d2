"""Fault injection: `make faults`, and the short version in tests/faults/test_faults.py."""

"""Faults on purpose: `make faults`, and the short version in tests/test_faults.py."""

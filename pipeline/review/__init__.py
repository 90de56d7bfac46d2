"""Masks that people look at and correct."""

"""Expectations held against measures: once per pipeline."""

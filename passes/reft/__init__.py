"""Interventions on hidden states."""

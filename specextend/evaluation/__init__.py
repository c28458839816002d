"""Measure methods on data sets: plan, workers, journal, figures per length."""

"""How histograms of recoveries are cut: alike in engines and in the operator, so that what both say can be compared."""

RECOVERY_BUCKETS_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""From a re-stitch between two steps to a stage that loads its weights from storage."""

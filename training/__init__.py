"""From cohort to model package."""

"""Win rates, intervals, figures and the report page."""

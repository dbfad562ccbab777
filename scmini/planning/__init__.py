"""Memory, disk and hours of a run, counted before anything is downloaded or loaded."""

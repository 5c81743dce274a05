"""What learned functions cost: time as ratios of one run, every variant checked before it is timed."""

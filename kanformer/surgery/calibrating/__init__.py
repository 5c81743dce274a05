"""What data says of the blocks before they are replaced: statistics, linear shares, importance."""

"""Context length against throughput: each contender's best strategy at every length, until none fits."""

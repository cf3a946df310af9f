"""Real data sets: their rows, prompting templates, partitions over clients and metrics."""

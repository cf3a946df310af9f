"""One script for each hot path; each prints ratios against a named baseline of the same run."""

"""Full-weight training through few rows of each matrix."""

"""A process on the node that holds the frozen model and does what client processes would do, message by message."""

"""Local training and evaluation of adapters over a frozen backbone."""

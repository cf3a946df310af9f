"""From a folder to real SuperLinks: project folders, keys, and a network for trials."""

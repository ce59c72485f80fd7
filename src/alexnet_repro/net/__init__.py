"""Networks, normalisation layers and tower placement. This code does not depend on files or configs."""

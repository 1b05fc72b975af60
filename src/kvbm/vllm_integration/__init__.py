"""Names that existing deployments of NVIDIA's KVBM use, so that their commands keep working."""

"""The public Python API; `import lift_ray` offers its names."""

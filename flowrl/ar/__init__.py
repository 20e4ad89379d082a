"""Training of autoregressive generators on captioned images; `pipelines.ar` has the generators."""

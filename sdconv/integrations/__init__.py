"""Everything that imports diffusers: patching its pipelines, its transformers, its own networks."""

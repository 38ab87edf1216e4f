"""Networks: adapters on diffusers' models, the LoRA bank, frozen encoders, loading and export."""

"""Networks: diffusers' models, the LoRA bank, frozen encoders, loading and export."""

"""Language models: loaded once per process, frozen, shared, with LoRA adapters swapped in place."""

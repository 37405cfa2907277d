"""Where others own the model or the loop: PEFT's models, Hugging Face's Trainer. Optional libraries load when used."""

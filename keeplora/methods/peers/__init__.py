"""The nearest peers of KeepLoRA: PEFT's own code starts their adapters, anew in every task; the protocol is ours."""

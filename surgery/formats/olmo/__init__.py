"""OLMo: model.pt or safetensors, and the sharded folders of its trainer."""

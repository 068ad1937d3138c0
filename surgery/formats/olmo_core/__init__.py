"""OLMo-core: a torch DCP folder with config.json."""

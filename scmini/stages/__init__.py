"""One file is one stage: `run(config, inputs, work)` reads earlier folders and fills its own."""

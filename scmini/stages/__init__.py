"""One file is one stage: `run(config, inputs, work)` reads the folders of earlier stages and fills its own."""

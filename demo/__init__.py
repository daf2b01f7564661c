"""A small made-up data set in the formats of VQA v2 and COCO captioning, made in seconds: `python -m demo.make`."""

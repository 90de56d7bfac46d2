"""Networks other than CLIP and Stable Diffusion: DINO for CLIPer, and the segmenters SAM 2, SAM 3 and TIPSv2."""

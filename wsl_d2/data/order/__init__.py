"""Order of the images: resampling and the sampler."""

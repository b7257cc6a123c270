"""Fallow: a marketplace that puts idle machines to work. Import `fallow.client` to submit jobs."""

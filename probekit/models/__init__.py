"""Builders of models that core itself knows: timm's and Hugging Face's. Packs bring the others."""

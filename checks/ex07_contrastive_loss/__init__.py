"""What judges ex07, Contrastive loss (CLIP)."""

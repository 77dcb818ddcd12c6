"""The contrastive method: InfoNCE over pairs with hard negatives."""

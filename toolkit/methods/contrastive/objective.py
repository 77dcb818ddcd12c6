"""InfoNCE over pairs, each text a vector by itself."""

from toolkit.data.pairs import PairBatch
from toolkit.methods.objective import Loss
from toolkit.methods.pair_loss import PairObjective
from toolkit.methods.shared import encode


class Contrastive(PairObjective):
    """Queries against the documents of their pool."""

    def forward(self, batch: PairBatch) -> Loss:
        query, of_queries = encode(self.encoder, batch.query, self.batch)
        document, of_documents = encode(self.encoder, batch.document, self.batch)
        return self.loss(query, document, batch, [of_queries, of_documents])

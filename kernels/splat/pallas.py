def composite(*a): raise NotImplementedError("pallas")

package objstore

// Of the key of 32 bytes 7: the name of "x", and an object "chunks/x" with "as it was".
const (
	goldenName   = "5618d974298c2ad4b457f20d0272513635629805964b646af9760b3b133fd8d0"
	goldenSealed = "440102128ed1dece3d8a38365fd488f3d20f34d76fda532a263b639258ff2aa876dc86832b2c23c69c68f4bb89df4610bdc3c86c"
)

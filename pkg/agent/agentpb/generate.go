package agentpb

//go:generate sh -c "GOBIN=$PWD/.bin go install google.golang.org/protobuf/cmd/protoc-gen-go github.com/containerd/ttrpc/cmd/protoc-gen-go-ttrpc"
//go:generate protoc --plugin=.bin/protoc-gen-go --plugin=.bin/protoc-gen-go-ttrpc --go_out=. --go_opt=paths=source_relative --go-ttrpc_out=. --go-ttrpc_opt=paths=source_relative agent.proto
//go:generate rm -r .bin

package serve_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"net"
	"os"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/drafter-vm/drafter/pkg/agent/internal/serve"
	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/types/known/emptypb"
)

func frame(stream uint32, kind byte, payload int) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(payload))
	b = append(binary.BigEndian.AppendUint32(b, stream), kind, 0)
	return append(b, make([]byte, payload)...)
}

// Who answers what nobody has asked loses the connection, and fills no log.
func TestAnswers(t *testing.T) {
	var log bytes.Buffer
	logrus.SetOutput(&log)
	defer logrus.SetOutput(os.Stderr)
	for name, said := range map[string][]byte{
		"never asked":     frame(7, 2, 0),
		"an even number":  frame(2, 2, 20),
		"data":            frame(1, 3, 5),
		"a request":       frame(1, 1, 5),
		"answered twice":  append(frame(1, 2, 0), frame(1, 2, 0)...),
		"unknown":         frame(1, 99, 0),
		"more than fits":  frame(3, 2, 1<<20),
		"many":            bytes.Repeat(frame(9, 2, 0), 10000),
		"many, the first": append(frame(1, 2, 0), bytes.Repeat(frame(9, 2, 0), 10000)...),
	} {
		t.Run(name, func(t *testing.T) {
			ours, theirs := net.Pipe()
			defer theirs.Close()
			ended := make(chan struct{})
			client := ttrpc.NewClient(serve.Answers(ours), ttrpc.WithOnClose(func() { close(ended) }))
			defer client.Close()
			go func() {
				b := make([]byte, 1<<10)
				theirs.Read(b) // the call
				theirs.Write(said)
				for {
					if _, err := theirs.Read(b); err != nil {
						return
					}
				}
			}()
			ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
			defer cancel()
			_ = client.Call(ctx, "s", "m", &emptypb.Empty{}, &emptypb.Empty{})
			select {
			case <-ended:
			case <-ctx.Done():
				t.Error("the connection goes on")
			}
		})
	}
	if log.Len() > 0 {
		t.Errorf("the process's log has %.200q", log.String())
	}
}

// What arrives in pieces is understood as well.
func TestAnswersInPieces(t *testing.T) {
	ours, theirs := net.Pipe()
	defer theirs.Close()
	client := ttrpc.NewClient(serve.Answers(struct{ net.Conn }{byByte{ours}}))
	defer client.Close()
	go func() {
		b := make([]byte, 1<<10)
		for call := uint32(1); ; call += 2 {
			if _, err := theirs.Read(b); err != nil {
				return
			}
			theirs.Write(frame(call, 2, 0))
		}
	}()
	for range 3 {
		if err := client.Call(t.Context(), "s", "m", &emptypb.Empty{}, &emptypb.Empty{}); err != nil {
			t.Fatal(err)
		}
	}
}

// byByte is a connection that reads one byte at a time.
type byByte struct{ net.Conn }

func (b byByte) Read(p []byte) (int, error) { return iotest.OneByteReader(b.Conn).Read(p) }

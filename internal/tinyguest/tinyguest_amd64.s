#include "textflag.h"

// Where the guest has what, in its memory. tinyguest.go says the same of what its owner may look at.
#define DESCRIPTORS 0x300000
#define AVAILABLE   0x301000
#define USED        0x302000
#define REQUEST     0x303000
#define OUTGOING    0x304000
#define DIRECTORY   0x305000
#define WRITTEN     0x306000
#define FLUSHED     0x306200
#define LEARNED     0x306208
#define BEGUN       0x306210
#define INCOMING    0x307000
#define COUNTERS    0x400000
#define COUNTERSEND 0x1000000
#define COUNTED     ((COUNTERSEND-COUNTERS)/4096)

// The registers of a virtio device (virtio 1.2, 4.2.2), from SI on.
#define DEVICEID    0x08
#define FEATURES    0x10
#define FEATURESSEL 0x14
#define ACKED       0x20
#define ACKEDSEL    0x24
#define QUEUESEL    0x30
#define QUEUESIZE   0x38
#define QUEUEREADY  0x44
#define NOTIFY      0x50
#define STATUS      0x70
#define DESCLOW     0x80
#define DRIVERLOW   0x90
#define DEVICELOW   0xa0

// code is the guest: R8 counts pages, R9 is the disk's block, R14 counts requests, SI is the disk's device, 0 if there is none.
//
// It has no stack and knows of no interrupt, and is made of instructions that every KVM runs, or emulates. It works wherever
// it is in memory.
TEXT ·code(SB), NOSPLIT|NOFRAME, $0-0
	// The devices are between 3 and 4 GiB, and mapped is 1 GiB.
	MOVQ $DIRECTORY, DI
	MOVQ $0xC0000083, AX
	MOVQ $512, CX
directory:
	MOVQ AX, (DI)
	ADDQ $8, DI
	ADDQ $0x200000, AX
	SUBQ $1, CX
	JNE  directory
	MOVQ $0xa018, DI
	MOVQ $(DIRECTORY|3), AX
	MOVQ AX, (DI)

	MOVQ $0, R8
	MOVQ $0, R9
	MOVQ $0, R14

	// The disk is one of the first devices from one of two addresses on, which depends on the version of the VMM.
	MOVQ $0xC0000000, SI
scan:
	MOVQ $16, CX
device:
	MOVL (SI), AX
	CMPL AX, $0x74726976
	JNE  other
	MOVL DEVICEID(SI), AX
	CMPL AX, $2
	JEQ  disk
other:
	ADDQ $0x1000, SI
	SUBQ $1, CX
	JNE  device
	MOVQ $0xD0000000, AX
	CMPQ SI, AX
	JHI  diskless
	MOVQ AX, SI
	JMP  scan
diskless:
	MOVQ $0, SI
	JMP  pass

disk:
	MOVL $0, STATUS(SI)
	MOVL $1, STATUS(SI)
	MOVL $3, STATUS(SI)
	MOVL $0, FEATURESSEL(SI)
	MOVL FEATURES(SI), AX
	ANDL $0x200, AX // flushes
	MOVL $0, ACKEDSEL(SI)
	MOVL AX, ACKED(SI)
	MOVL $1, ACKEDSEL(SI)
	MOVL $1, ACKED(SI) // version 1
	MOVL $11, STATUS(SI)
	MOVL $0, QUEUESEL(SI)
	MOVL $8, QUEUESIZE(SI)
	MOVL $DESCRIPTORS, DESCLOW(SI)
	MOVL $0, (DESCLOW+4)(SI)
	MOVL $AVAILABLE, DRIVERLOW(SI)
	MOVL $0, (DRIVERLOW+4)(SI)
	MOVL $USED, DEVICELOW(SI)
	MOVL $0, (DEVICELOW+4)(SI)
	MOVL $1, QUEUEREADY(SI)
	MOVL $15, STATUS(SI)
	MOVQ $AVAILABLE, DI
	MOVQ $1, AX
	MOVQ AX, (DI) // no interrupts

	// What is on the disk from a life before: it counts on from there.
learn:
	MOVQ $INCOMING, R11
	MOVQ $0, R10
	MOVQ $0x0002000300001000, R12
	MOVQ $0x0001000100000010, R13
	MOVQ $4, R15
	JMP  request

learned:
	MOVQ $WRITTEN, DI
	MOVQ R9, AX
	SHLQ $3, AX
	ADDQ AX, DI
	MOVQ (R11), AX
	MOVQ AX, (DI)
	CMPQ AX, R8
	JLS  lower
	MOVQ AX, R8
lower:
	ADDQ $1, R9
	ANDQ $63, R9
	CMPQ R9, $0
	JNE  learn
	MOVQ $LEARNED, DI
	MOVQ R8, (DI)

pass:
	MOVQ $BEGUN, DI
	MOVQ (DI), CX
	MOVQ $COUNTERS, BX
page:
	CMPQ CX, $0
	JEQ  fresh
	MOVQ (BX), AX
	ADDQ $COUNTED, AX
	CMPQ AX, R8
	JNE  broken
fresh:
	MOVQ R8, (BX)
	ADDQ $4096, BX
	ADDQ $1, R8
	CMPQ BX, $COUNTERSEND
	JNE  page
	MOVQ $BEGUN, DI
	MOVQ $1, AX
	MOVQ AX, (DI)
	MOVQ $0x3f8, DX
	MOVQ $'.', AX
	OUTB

	// Is there anything on the serial port?
	MOVQ $0x3fd, DX
	INB
	ANDQ $1, AX
	CMPQ AX, $0
	JEQ  quiet
	MOVQ $0x3f8, DX
	INB
	ANDQ $0xff, AX
	CMPQ AX, $'r'
	JEQ  reset
	OUTB
quiet:
	CMPQ SI, $0
	JEQ  pass

	// Write the block, and remember what.
	MOVQ $OUTGOING, R11
	MOVQ R8, (R11)
	MOVQ $WRITTEN, DI
	MOVQ R9, AX
	SHLQ $3, AX
	ADDQ AX, DI
	MOVQ R8, (DI)
	MOVQ $1, R10
	MOVQ $0x0002000100001000, R12
	MOVQ $0x0001000100000010, R13
	MOVQ $1, R15
	JMP  request

written:
	MOVQ $4, R10
	MOVQ $0x0002000100000010, R13 // no data
	MOVQ $2, R15
	JMP  request

flushed:
	MOVQ $FLUSHED, DI
	MOVQ R8, (DI)

	// Read the next block.
	ADDQ $1, R9
	ANDQ $63, R9
	MOVQ $INCOMING, R11
	MOVQ $0, R10
	MOVQ $0x0002000300001000, R12
	MOVQ $0x0001000100000010, R13
	MOVQ $3, R15
	JMP  request

read:
	MOVQ $WRITTEN, DI
	MOVQ R9, AX
	SHLQ $3, AX
	ADDQ AX, DI
	MOVQ (DI), AX
	MOVQ (R11), BX
	CMPQ AX, BX
	JEQ  pass

broken:
	MOVQ $0x3f8, DX
	MOVQ $'X', AX
	OUTB
end:
	JMP end

reset: // by the keyboard's controller
	MOVQ $0x64, DX
	MOVQ $0xfe, AX
	OUTB
	JMP  end

request: // of kind R10 and the block R9, with data at R11
	MOVQ $REQUEST, DI
	MOVQ R10, (DI)
	MOVQ R9, AX
	SHLQ $3, AX
	MOVQ AX, 8(DI)
	MOVQ $0xff, AX
	MOVQ AX, 16(DI)
	MOVQ $DESCRIPTORS, BX
	MOVQ DI, (BX)
	MOVQ R13, 8(BX)
	MOVQ R11, 16(BX)
	MOVQ R12, 24(BX)
	ADDQ $16, DI
	MOVQ DI, 32(BX)
	MOVQ $0x0000000200000001, AX
	MOVQ AX, 40(BX)
	ADDQ $1, R14
	MOVQ $AVAILABLE, BX // all of its entries are 0, as is the first descriptor
	MOVW R14, 2(BX)
	MOVL $0, NOTIFY(SI)
	MOVQ $USED, BX
	MOVQ R14, CX
	ANDQ $0xffff, CX
answer:
	MOVWLZX 2(BX), AX
	CMPQ AX, CX
	JNE  answer
	MOVBLZX (DI), AX
	CMPQ AX, $0
	JNE  broken
	CMPQ R15, $1
	JEQ  written
	CMPQ R15, $2
	JEQ  flushed
	CMPQ R15, $3
	JEQ  read
	JMP  learned

	// tinyguest.go finds the end by this.
	BYTE $0xdb; BYTE $0xe5; BYTE $0x7f; BYTE $0x0c; BYTE $0x92; BYTE $0x41; BYTE $0xee; BYTE $0x38

DATA ·start(SB)/8, $·code(SB)
GLOBL ·start(SB), RODATA|NOPTR, $8

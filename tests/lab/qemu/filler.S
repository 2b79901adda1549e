# A guest with memory in use: it writes a word into each page from 16 MiB up to LAST, which whoever assembles it says, and
# then, about 500 times a second, adds one to a counter in memory (at 0x1000), writes the next of those pages again, and
# prints "M=xxxxxxxx D=xxxxxxxx" on COM1. D is the first word of LBA 1 of its boot disk; every 16th round adds one to it,
# so that 16 D - M stays the same within 16 as long as memory and disk are of one instant.
# It is a boot sector: the image is 512 bytes of code and LBA 1.
.set FIRST, 0x1000000
# Not in the page of the code: an emulator looks at every write there.
.set M, 0x1000
.set NEXT, 0x1004
.set BUFFER, 0x1200
.set STACK, 0x3000
.code16
.globl _start
_start:
  cli
  xorw %ax,%ax
  movw %ax,%ds
  movw %ax,%es
  movw %ax,%ss
  movw $STACK,%sp
  movb %dl, drive
  # The first timer interrupts every 2 ms.
  movb $0x34,%al
  outb %al,$0x43
  movb $(2386 & 255),%al
  outb %al,$0x40
  movb $(2386 >> 8),%al
  outb %al,$0x40
  inb $0x92,%al
  orb $2,%al
  outb %al,$0x92
  movl $FIRST,%edi
  call reach
fill:
  call write
  jb fill
  movl $FIRST, NEXT
  movl $0, M
  movb $0x42,%ah
  call io
loop:
  sti
  hlt
  incl M
  cli
  call reach
  movl NEXT,%edi
  call write
  jb 1f
  movl $FIRST,%edi
1:
  movl %edi, NEXT
  testb $15, M
  jnz 1f
  incl BUFFER
  movb $0x43,%ah
  call io
1:
  movw $('M' + ('=' << 8)),%dx
  movl M,%ebx
  call word
  movw $('D' + ('=' << 8)),%dx
  movl BUFFER,%ebx
  call word
  movb $'\n',%al
  call putc
  jmp loop

# Has es reach 4 GiB: a segment's limit that is loaded in protected mode stays, until the BIOS puts it back.
reach:
  lgdtl gdtr
  movl %cr0,%eax
  orb $1,%al
  movl %eax,%cr0
  movw $8,%bx
  movw %bx,%es
  andb $0xfe,%al
  movl %eax,%cr0
  xorw %bx,%bx
  movw %bx,%es
  ret
# Writes the page at edi, and has edi lead to the next one; carry is set while that is none behind the last.
write:
  incl %es:4(%edi)
  movl %edi,%es:(%edi)
  addl $0x1000,%edi
  cmpl $LAST,%edi
  ret
# LBA 1 from or to BUFFER.
io:
  xorb %al,%al
  movb drive,%dl
  movw $dap,%si
  int $0x13
  ret
# Prints dl, dh, ebx, and a blank.
word:
  movb %dl,%al
  call putc
  movb %dh,%al
  call putc
  movw $8,%cx
3: roll $4,%ebx
  movb %bl,%al
  andb $15,%al
  addb $48,%al
  cmpb $58,%al
  jb 4f
  addb $39,%al
4: call putc
  loop 3b
  movb $' ',%al
putc:
  pushw %dx
  pushw %ax
  movw $0x3fd,%dx
2: inb %dx,%al
  testb $0x20,%al
  jz 2b
  popw %ax
  movw $0x3f8,%dx
  outb %al,%dx
  popw %dx
  ret
drive: .byte 0
.balign 8
gdt: .quad 0, 0x00cf92000000ffff
gdtr: .word 15
  .long gdt
.balign 4
dap: .byte 16,0
  .word 1          # sectors
  .word BUFFER,0   # buffer off,seg
  .long 1,0        # LBA
.org 510
.word 0xaa55

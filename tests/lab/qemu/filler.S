# The counting guest of counter.S with much memory in use: before it counts it writes a word into each page from 16 MiB
# to 816 MiB (the machine needs 1 GiB).
# At about 18 Hz it adds one to a counter in memory (at 0x7000) and one to the first word of LBA 1 of its boot disk,
# and prints "M=xxxxxxxx D=xxxxxxxx" on COM1. It is a boot sector: the image is 512 bytes of code and LBA 1.
.code16
.globl _start
_start:
  cli
  xorw %ax,%ax
  movw %ax,%ds
  movw %ax,%es
  movw %ax,%ss
  movw $0x7c00,%sp
  movb %dl, drive
  # A segment of 4 GiB is loaded in protected mode, and its limit stays.
  inb $0x92,%al
  orb $2,%al
  outb %al,$0x92
  lgdtl gdtr
  movl %cr0,%eax
  orb $1,%al
  movl %eax,%cr0
  movw $8,%bx
  movw %bx,%es
  andb $0xfe,%al
  movl %eax,%cr0
  movl $0x1000000,%edi
fill:
  movl %edi,%es:(%edi)
  addl $0x1000,%edi
  cmpl $0x33000000,%edi
  jb fill
  xorw %bx,%bx
  movw %bx,%es
  sti
  movl $0, 0x7000
  movw $boot, %si
  call puts
loop:
  # LBA 1 goes to 0x7200
  movb $0x42,%ah
  call io
  jc err
  incl 0x7200
  incl 0x7000
  movb $0x43,%ah
  call io
  jc err
  movw $smm,%si
  call puts
  movl 0x7000,%ebx
  call hex
  movw $sdd,%si
  call puts
  movl 0x7200,%ebx
  call hex
  movw $nl,%si
  call puts
  hlt
  jmp loop
err:
  movw $se,%si
  call puts
  hlt
  jmp loop
io:
  xorb %al,%al
  movb drive,%dl
  movw $dap,%si
  int $0x13
  ret
puts:
  lodsb
  testb %al,%al
  jz 1f
  call putc
  jmp puts
1: ret
putc:
  pushw %ax
  movw $0x3fd,%dx
2: inb %dx,%al
  testb $0x20,%al
  jz 2b
  popw %ax
  movw $0x3f8,%dx
  outb %al,%dx
  ret
hex:
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
  ret
drive: .byte 0
boot: .asciz "BOOT\n"
smm: .asciz "M="
sdd: .asciz " D="
nl: .asciz "\n"
se: .asciz "IOERR\n"
.balign 8
gdt: .quad 0, 0x00cf92000000ffff
gdtr: .word 15
  .long gdt
.balign 4
dap: .byte 16,0
  .word 1          # sectors
  .word 0x7200,0   # buffer off,seg
  .long 1,0        # LBA
.org 510
.word 0xaa55

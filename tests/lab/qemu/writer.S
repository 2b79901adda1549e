# A guest that writes all the time, so that what is on its disks follows from one number.
# Each round r (about 18 a second; r is one more than the first word of LBA 1 of its boot disk) writes, in this order:
#   127 sectors at LBA 64 + 128 * (r mod 224), each beginning with r and with the time at which the guest was booted;
#   r into LBA 1 of the boot disk; r into LBA 1 of the second disk, if there is one.
# Then it prints "M=xxxxxxxx D=xxxxxxxx" on COM1: rounds since it was booted, and r. It is a boot sector; the disk needs
# 16 MiB.
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
  sti
  xorb %ah,%ah
  int $0x1a
  movw %dx, salt
  movw %cx, salt+2
  movl $0, 0x7000
loop:
  # LBA 1 goes to 0x7200
  movb $0x42,%ah
  call io
  jc err
  incl 0x7200
  incl 0x7000
  call data
  jc err
  movb $0x43,%ah
  call io
  jc err
  xorb $1,drive
  movb $0x43,%ah
  call io
  xorb $1,drive
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
data:
  movw $0x1000,%ax
  movw %ax,%es
  xorw %di,%di
  movw $127,%cx
  movl 0x7200,%eax
  movl salt,%ebx
5: movl %eax,%es:(%di)
  movl %ebx,%es:4(%di)
  addw $512,%di
  loop 5b
  xorl %edx,%edx
  movl $224,%ecx
  divl %ecx
  shll $7,%edx
  addl $64,%edx
  movl %edx,dap2+8
  movb $0x43,%ah
  movw $dap2,%si
  jmp 6f
io:
  movw $dap,%si
6: xorb %al,%al
  movb drive,%dl
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
smm: .asciz "M="
sdd: .asciz " D="
nl: .asciz "\n"
se: .asciz "IOERR\n"
.balign 4
dap: .byte 16,0
  .word 1          # sectors
  .word 0x7200,0   # buffer off,seg
  .long 1,0        # LBA
dap2: .byte 16,0
  .word 127
  .word 0,0x1000
  .long 64,0
.balign 4
salt: .long 0
.org 510
.word 0xaa55

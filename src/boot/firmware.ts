/** How a disk wants to be started: by a BIOS or by UEFI. */
import { existsSync } from 'node:fs';

import type { PartitionTable } from '../devices/table.js';
import { B2Error } from '../errors.js';

export type Firmware = 'bios' | 'uefi';

/** GPT partition types (UEFI specification; GRUB's manual). */
const ESP = 'c12a7328-f81f-11d2-ba4b-00a0c93ec93b';
const BIOS_BOOT = '21686148-6449-6e6f-744e-656564454649';
const MBR_ESP = '0xef';
/** Bytes of a boot sector that hold a program. */
const BOOT_CODE_BYTES = 440;

/**
 * What a disk with that partition table (undefined: none) is started by, and why. UEFI where there is an EFI system partition and
 * nothing that a BIOS could start; the BIOS otherwise, which is what old machines have had.
 */
export function firmwareOf(table: PartitionTable | undefined): {
  readonly firmware: Firmware;
  readonly why: string;
} {
  if (table === undefined) return { firmware: 'bios', why: 'there is no partition table' };
  const types = table.facts.partitions.map((p) => p.type.toLowerCase());
  const hasCode = table.sector0.subarray(0, BOOT_CODE_BYTES).some((byte) => byte !== 0);
  const hasEsp = types.includes(ESP) || types.includes(MBR_ESP);
  if (!hasEsp) return { firmware: 'bios', why: 'there is no EFI system partition' };
  if (types.includes(BIOS_BOOT) && hasCode)
    return { firmware: 'bios', why: 'there is a BIOS boot partition' };
  if (table.facts.type === 'mbr' && hasCode)
    return { firmware: 'bios', why: 'there is a boot program in its first sector' };
  return { firmware: 'uefi', why: 'there is an EFI system partition and nothing for a BIOS' };
}

/** Program and the template of the variables, as distributions install them; without Secure Boot. */
const OVMF: readonly (readonly [code: string, vars: string])[] = [
  ['/usr/share/OVMF/OVMF_CODE_4M.fd', '/usr/share/OVMF/OVMF_VARS_4M.fd'],
  ['/usr/share/OVMF/OVMF_CODE.fd', '/usr/share/OVMF/OVMF_VARS.fd'],
  ['/usr/share/edk2/ovmf/OVMF_CODE.fd', '/usr/share/edk2/ovmf/OVMF_VARS.fd'],
  ['/usr/share/edk2/x64/OVMF_CODE.4m.fd', '/usr/share/edk2/x64/OVMF_VARS.4m.fd'],
  ['/usr/share/edk2-ovmf/x64/OVMF_CODE.fd', '/usr/share/edk2-ovmf/x64/OVMF_VARS.fd'],
  ['/usr/share/qemu/ovmf-x86_64-code.bin', '/usr/share/qemu/ovmf-x86_64-vars.bin'],
];

/** UEFI for QEMU. Kind `unsupported` where none is installed. */
export function findOvmf(exists: (path: string) => boolean = existsSync): {
  readonly code: string;
  readonly vars: string;
} {
  for (const [code, vars] of OVMF) if (exists(code) && exists(vars)) return { code, vars };
  throw new B2Error(
    'unsupported',
    'the disk is started by UEFI, and there is no UEFI for QEMU on this machine',
    { hint: 'Install the package ovmf (edk2-ovmf), or try --firmware bios.' },
  );
}

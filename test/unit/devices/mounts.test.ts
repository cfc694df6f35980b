import { describe, expect, it } from 'vitest';

import { parseMountInfo, parseSwaps } from '../../../src/devices/mounts.js';
import { parseBlkid } from '../../../src/devices/inspect.js';

describe('lists of the kernel and of blkid', () => {
  it('reads mountinfo: optional fields, escapes, anonymous devices', () => {
    const text = [
      '27 1 254:0 / / rw,relatime - ext4 /dev/vda rw',
      '36 35 98:0 /mnt1 /mnt\\0402/a\\134b rw,noatime master:1 propagate_from:2 - ext3 /dev/my\\040root rw,errors=continue',
      '99 27 0:45 /sub /sr\\303\\274v rw shared:7 - btrfs /dev/sdb1 rw,space_cache',
      'nonsense',
      '',
    ].join('\n');
    expect(parseMountInfo(text)).toEqual([
      { devNumber: '254:0', mountPoint: '/', fsType: 'ext4', source: '/dev/vda' },
      { devNumber: '98:0', mountPoint: '/mnt 2/a\\b', fsType: 'ext3', source: '/dev/my root' },
      { devNumber: '0:45', mountPoint: '/srüv', fsType: 'btrfs', source: '/dev/sdb1' },
    ]);
  });

  it('reads swaps', () => {
    const text =
      'Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n/dev/sda2  partition\t1048572\t0\t-2\n/swap\\040file file\t10\t0\t-3\n';
    expect(parseSwaps(text)).toEqual(['/dev/sda2', '/swap file']);
    expect(parseSwaps('')).toEqual([]);
  });

  it("reads blkid's export", () => {
    expect(
      parseBlkid('DEVNAME=/dev/x\nLABEL=my\\ label\nUUID=1-2\nTYPE=reiserfs\nUSAGE=filesystem\n'),
    ).toEqual([{ type: 'reiserfs', usage: 'filesystem', label: 'my label', uuid: '1-2' }]);
    expect(parseBlkid('TYPE=zfs_member\nUSAGE=filesystem\n')[0]?.usage).toBe('filesystem');
    expect(parseBlkid('TYPE=crypto_LUKS\nUSAGE=crypto\n')[0]?.usage).toBe('encrypted');
    expect(parseBlkid('PTTYPE=gpt\nPTUUID=1\n')).toEqual([]);
  });
});

#!/usr/bin/perl
# The stock: an exec handler in Perl, without a library. One JSON line in an event, one JSON line out.
#
# The goods are in the journal $ORDER_DIR/stock: "add - book 100", "reserve <instance> book 2", "release <instance> book 2". Any number
# of these programs share it: whoever holds the lock reads what the others wrote, decides, and appends a line. An event may come
# again: the instance's lines tell.
use strict;
use warnings;
use Fcntl qw(:flock SEEK_CUR);
use JSON::PP;

my $path = ($ENV{ORDER_DIR} // 'target/order') . '/stock';
open(my $journal, '+>>', $path) or die "$path: $!";
$| = 1;
my $json = JSON::PP->new->utf8->canonical;
my (%left, %reserved, %released);
my $offset = 0;

while (my $line = <STDIN>) {
    my $event = $json->decode($line)->{event};
    my %answer = (id => $event->{id}, source => $event->{source}, status => 'done');
    flock($journal, LOCK_EX) or die "lock: $!";
    catch_up();
    my ($instance, $data) = ($event->{processid}, $event->{data});
    if ($event->{type} eq 'inventory.reserve' && !$reserved{$instance}) {
        my ($sku, $quantity) = @$data{qw(sku quantity)};
        my $left = $left{$sku} // 0;
        if ($left >= $quantity) {
            note("reserve $instance $sku $quantity");
        } else {
            @answer{qw(status error)} = ('dead', "out of stock: $left left");
        }
    } elsif ($event->{type} eq 'inventory.release' && $reserved{$instance} && !$released{$instance}) {
        note("release $instance @{$reserved{$instance}}");
    }
    flock($journal, LOCK_UN);
    print $json->encode(\%answer), "\n";
}

# Reads what was written since.
sub catch_up {
    seek($journal, $offset, 0);
    while (my $line = <$journal>) {
        $offset += length $line;
        my ($what, $instance, $sku, $quantity) = split ' ', $line;
        $left{$sku} += $what eq 'reserve' ? -$quantity : $quantity;
        $reserved{$instance} = [$sku, $quantity] if $what eq 'reserve';
        $released{$instance} = 1 if $what eq 'release';
    }
}

# One write a line: a kill cuts none in two. The next `catch_up` reads it.
sub note {
    syswrite($journal, "$_[0]\n") or die "$path: $!";
    $journal->sync;
    catch_up();
}
